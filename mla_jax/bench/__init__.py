"""The benchmark behind `mla-jax bench`: workloads, device time by one rule, ceilings, peer, report.

From Python, for tuning: compile the candidates, build the workload's arrays once, measure each on them.

    from mla_jax.bench import inputs, runner, workloads

    workload = workloads.WORKLOADS["dense-b128-sq1-h128-sk4096"]
    chains = {c: runner.compile_chain(workload, implementation="mosaic", config=c) for c in candidates}
    arrays = inputs.build(workload, sets=next(iter(chains.values())).sets)
    for config, chain in chains.items():
        print(config, runner.measure(chain, inputs=arrays).us)
"""

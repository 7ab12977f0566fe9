"""How tests compile."""

# Compiler options for what runs once or a few times: compiling is what takes the time in tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

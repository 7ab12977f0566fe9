"""A fuzzer for the ops and the caches: `mla-jax fuzz` runs it.

    case = draw(seed, number)                     # a whole call, garbage included
    problem = check(case, ["xla"]).problem        # None, or what is wrong
    case = shrink(case, ["xla"])                  # smaller, with the same problem
    print(snippet(case, "xla", problem=problem))  # a script that shows it

`cases` draws, `oracle` says what must come out (NumPy, float64, from the bytes up), `checks` compares, `loop` repeats.
"""

from mla_jax.fuzz.cases import SIZES, Case, Spec, draw
from mla_jax.fuzz.checks import Outcome, check
from mla_jax.fuzz.loop import Failure, Tally, search
from mla_jax.fuzz.scripts import snippet
from mla_jax.fuzz.shrinking import shrink

__all__ = ["SIZES", "Case", "Failure", "Outcome", "Spec", "Tally", "check", "draw", "search", "shrink", "snippet"]

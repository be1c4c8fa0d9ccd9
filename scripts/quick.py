"What lets a process that compiles hundreds of small programs be done sooner: one that runs a page, or tests"

import gc
import importlib
import threading


def settle() -> None:
    "Collect garbage seldom, and lower several programs in one context"
    gc.set_threshold(200_000, 50, 100) # tracing makes many small objects, and hardly a cycle
    keep_contexts()


def keep_contexts() -> None:
    """Let a JAX that makes a context of MLIR for each program lower ten in one, as JAX 0.12 does: to
    make one takes longer than to lower a small program"""
    lowering = importlib.import_module("jax._src.interpreters.mlir")
    make = getattr(lowering, "make_ir_context", None)
    if make is None or hasattr(lowering, "_thread_local_context"): return
    kept = threading.local()

    def make_ir_context():
        if is_lowering(): return make() # a program that is needed to lower another one
        if not getattr(kept, "left", 0): kept.context, kept.left = make(), 10
        kept.left -= 1
        return kept.context

    def is_lowering():
        try:
            return lowering.ir.Context.current is not None
        except ValueError:
            return False

    lowering.make_ir_context = make_ir_context

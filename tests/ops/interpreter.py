"""Triton's interpreter in half of its time, for kernels that call functions of their own."""

import dataclasses


def quicken():
    """Leave out what makes no difference to a test: to call once in an interpreting process.

    The language is patched at every call of a function within a kernel, and so wrapped once more;
    here once a launch. And sums and products of integers are made in 64 bits too, to find
    overflows; a compiled kernel does that for debugging alone.
    """
    from triton.runtime import interpreter

    builder, patch_language = interpreter.interpreter_builder, interpreter._patch_lang
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    launch, patched = interpreter._LangPatchScope(), set()

    def patch(fn):
        nonlocal launch, patched
        known = {id(value) for value in fn.__globals__.values()}
        wanted = {x for x in (interpreter.tl, interpreter.tl.core) if id(x) in known}
        if not launch._changes:  # the last launch has ended
            launch, patched = patch_language(fn), wanted
        elif not wanted <= patched:
            launch._changes += patch_language(fn)._changes
            patched |= wanted
        return launch

    interpreter._patch_lang = patch

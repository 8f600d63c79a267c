"""What only the machine needs: operators and their backends. Nothing here imports from the folder above.

build.py                compiles and caches the C++ files.
involution_arguments.py checks what users hand to involution's functions; involution_ops.py registers its operators with
                        PyTorch, chooses a backend, and differentiates.
involution_*.py         its backends: cpu (C++), triton (CUDA), torch (everywhere), with functions of the same names.
fast_cell_*.py          the backends of the cells of fast_cell.py: cpu (C++, with the headers) and torch (everywhere).
inference_cpu.*         a derived network in evaluation: all its passes for a few images at a time.

A new pass of an involution is a function of one name in all its backends and a `_define` in involution_ops.py (schema,
check, fake, FLOPs, derivative); one of the cells, a Function in fast_cell_cpu.py, its loops in the C++ file beside it
and the plain formula in fast_cell_torch.py. Its test holds each backend equal to the plain one, with all gradients.
"""

"""What only the machine needs: operators and their backends. Nothing here imports from the folder above.

build.py                compiles and caches the C++ files.
involution_arguments.py checks what users hand to involution's functions; involution_ops.py registers its operators with
                        PyTorch, chooses a backend, and differentiates.
involution_*.py         its backends: cpu (C++), triton (CUDA), torch (everywhere), with functions of the same names.
fast_cell_*.py          the backends of the cells of fast_cell.py: cpu (C++, with the headers) and torch (everywhere).
recorded.*              a training pass of all cells: its calls of C++, recorded once, with no Python between them.
inference_cpu.*         a derived network in evaluation: all its passes for a few images at a time.
unchanged.py            whether a network's modules are still those of which a program was made.

A new pass of an involution is a function of one name in all its backends and a `_define` in involution_ops.py
(schema, check, fake, FLOPs, derivative). One of the cells is a Function in fast_cell_cpu.py with its loops in the C++
file beside it, the plain formula in fast_cell_torch.py where the supernet needs it too (else the cell module by
module is what it is held to), and a method of inference_cpu.Recording where an evaluation has it. What it does with
values it does in C++, or it cannot be recorded. Its test holds it equal to the plain one, with all gradients.
"""

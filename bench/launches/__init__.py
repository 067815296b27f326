"""What a GPU would launch, seen on a machine without one.

    python -m bench.launches --label "what is new"

compiles and captures the engine's steps for an H100 and counts what a step launches and moves, by kind, into
profiles/launches-sm90.md. Dynamo, Inductor, PyTorch's dispatch, Triton, its ptxas and the calls of a capture are real.
CUDA itself is a stand-in that launches nothing (runtime.c, device.c), and so are convolutions, matrix products and
attention (operators.py): no value and no time means anything, and what cuDNN and cuBLAS launch inside a call is not
known. It takes gcc and PyTorch's CUDA build in version 2.11, whose symbols the stand-in has.
"""

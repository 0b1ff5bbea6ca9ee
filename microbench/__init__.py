"""Times the operations of MoE serving on the GPUs at hand; needs torch and numpy only.

    python -m microbench --out DIR [--model-shapes FILE] [--minutes 10] [--only op,...]
    torchrun --nproc-per-node 8 -m microbench --out DIR

cases         Case: one shape of one operation; the operations with their key and axis columns
models        shapes of five published models, used without --model-shapes
shapes        reading a shapes file (written by `moeplan profiles shapes`)
grid          which token counts and sizes, in which order
schedule      what to measure next, so that every time budget gives a usable profile
work          Work: a case made ready to run
device        the accelerator or the CPU: memory, cache flush, random tensors
ranks         the processes under torchrun
timing        warm-up, samplers, stop rule
precision     fp8 quantisation and the comparison with a reference
ceilings      data-sheet peaks: nothing is faster
routing       which expert every token goes to
gemm, experts, parts, layers, attention, host, memory, collectives, exchange      one bench per noun
benches       which bench makes which operation
results       CSV files that survive a kill
environment   meta.json: what was measured, with which software, at which clocks
runner        one run: next case, prepare, check, time, record

Imports torch, numpy and the standard library only, so the folder can be copied to a bare machine.
"""

from __future__ import annotations

__version__ = "0.1.0"

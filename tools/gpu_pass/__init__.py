"""A pass over a GPU that is lent for minutes: what `tools/gpu_check.py` runs there, and what becomes of its results.

`plan` lists the steps with the time that each is worth; `runner` carries them out, each in a process of its own, and
packs what they wrote after every one.  Steps made of many small items (`checks`, `emulated`, `times`, `arithmetic`,
`tuning`) write each as it is done, by `records`, and go on behind an item that crashed, hung or spoiled the device.
`kernels` lists what a machine without the compiler needs in its bundle.  `fit` takes results in.
"""

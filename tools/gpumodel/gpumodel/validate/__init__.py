"""Published times of kernels beside modelled ones: ``python -m gpumodel.validate``.

The kernels come from packages of other projects, which are installed into folders of their own, see the README.  They
run in the emulator once; recordings are kept, so that a fit replays them.
"""

"""What kernels are composed of: memory, conversions, mathematics, reductions.  Importing it loads the compiler."""

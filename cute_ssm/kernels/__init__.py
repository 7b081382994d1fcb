"""The kernels, one class each.  Importing a module of this package loads the compiler; importing the package does not."""

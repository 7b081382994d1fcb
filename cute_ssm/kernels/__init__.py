"""The kernels, one class each.  Importing one of these modules loads the compiler; importing the package does not."""

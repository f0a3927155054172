// What generated kernels use of CUDA's header of this name is in matrix.h, which device.h includes.

// Generated kernels include this header of CUDA's and use nothing of it.

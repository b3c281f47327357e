//! Kernels: their life, their files, their runner.

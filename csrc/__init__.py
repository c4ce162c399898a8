"""The sources of the native kernels, installed as ``fastd2o.csrc`` so that first use can compile them."""

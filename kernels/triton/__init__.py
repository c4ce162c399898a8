"""Triton kernels of FastD2O, imported as ``fastd2o.kernels``.

The folder that holds this one has no ``__init__.py`` on purpose: a top-level package named ``kernels`` would shadow
Hugging Face's.
"""

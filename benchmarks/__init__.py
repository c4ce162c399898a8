"""Measures FastD2O beside its peers: ``fastd2o bench``.

In a checkout this package is ``benchmarks``, installed it is ``fastd2o.benchmarks``; so its modules import each other
relatively.
"""

"""Settings that all tests share."""

import contextlib

with contextlib.suppress(ImportError):  # the GPU tests do without it
    from hypothesis import settings

    # A busy machine is not a wrong result: no test fails for the time that it took.
    settings.register_profile("fastd2o", deadline=None)
    settings.load_profile("fastd2o")

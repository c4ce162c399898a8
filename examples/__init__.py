"""Text and data that the demo and the documentation use, shipped inside the package as ``fastd2o.examples``."""

"""Static quantizers, each tuned for one bit width: what an elastic model is measured against.

A method turns a weight into the values that it would have at one width; nothing is packed, as only quality
counts here. `compare.measure_static` runs them on a model and puts its weights back.
"""

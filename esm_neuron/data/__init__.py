"""From files to packed batches."""

from esm_neuron.config.deferred import module, window

_api = module("pandas.api")
_api.extensions, _api.types = module("pandas.api.extensions"), module("pandas.api.types")
with window({"pandas": {"api": _api}}, optional=True):
    # pyarrow imports pandas with its first array, to know whether that is made of one of pandas' classes
    import pyarrow

    pyarrow.array([0])

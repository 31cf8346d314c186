"""An inference server for compiled modules: KServe v2 (Open Inference Protocol) over HTTP.

One front process speaks HTTP, checks requests, holds the one bounded queue and forms batches; it loads neither TVM nor
the model. Worker processes load the model once each, on CPUs of their own, and exchange tensors with the front through
shared memory, so that a crash in a kernel takes one worker and no connection. See docs/serve.md.
"""

# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA models and converted decoders in vLLM. The `vllm.general_plugins` entry point is [`gma_hf.serving.plugin.register`].

`steps` and `slots` do not use vLLM: they say which tokens of a step belong together, and how the memory of a layer is stored
in a slot. `layer` connects both with the interface of vLLM for recurrent layers. `native` and `converted` are the models.
`checks` refuses, at the start, models and options that cannot be served.
"""

# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
GMA models and converted decoders inside vLLM, whose `vllm.general_plugins` entry point is [`gma_hf.serving.plugin.register`].

`steps` and `slots` know nothing of vLLM: which tokens of a step belong together, and how the memory of a layer lies in a slot.
`layer` joins both to vLLM's interface for recurrent layers; `native` and `converted` are the models; `checks` refuses at start
what cannot be served.
"""

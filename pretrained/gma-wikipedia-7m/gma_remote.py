# Loads this checkpoint in programs that do not import gma_hf themselves. The package must be installed.
try:
    from gma_hf import (
        GMAConfig,
        GMAForCausalLM,
        GMAForMaskedLM,
        GMAForQuestionAnswering,
        GMAForSequenceClassification,
        GMAForTokenClassification,
        GMAModel,
    )
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "gma_hf":
        raise
    raise ImportError("This checkpoint needs the package gma_hf: in a clone of the repository of gma_hf, run `pip install .`.") from error

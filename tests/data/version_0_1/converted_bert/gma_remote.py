# Loads this checkpoint in programs that do not import gma_hf themselves. It needs the package: pip install gma_hf

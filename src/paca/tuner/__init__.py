"""PaCA as a method of PEFT: the model, its targets, adapters as files and as a set."""

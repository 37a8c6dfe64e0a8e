"""One training loop for finetuning, few-shot and multitask, and the export of its result."""

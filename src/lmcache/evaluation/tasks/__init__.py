"""Tasks: prompts of several passages and a question, generated from seeds. One kind is one file."""

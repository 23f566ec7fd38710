"""A file a task: its batch, loss, evaluator, best metric and what is shown of it."""

"""Tasks: the settings of a YAML file go in, a task with queries, demonstrations and a score comes out.

`build` checks the settings and makes an `examples.ExampleTask` (captions, questions, classes) or a
`binding.BindingTask` from the examples that `sources` reads. Begin with `build.build_task`; the protocol of a task is
in `eval/task.py`.
"""

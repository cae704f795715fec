"""One module a source of pages. Each has `add_arguments(parser)` and `run(args)`; `args.out` is the folder to fill."""

"""One worker process: joins its routers, runs jobs on its engine, streams one batch of tokens per engine step."""

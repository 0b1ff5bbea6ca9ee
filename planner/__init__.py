"""moeplan: capacity planning for mixture-of-experts serving. Start reading at `planner.recommend`."""

__version__ = "0.1.0"

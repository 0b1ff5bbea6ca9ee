"""Facts of GPU systems as TOML, one file per system, and measured kernel tables; read by `planner.hardware`."""

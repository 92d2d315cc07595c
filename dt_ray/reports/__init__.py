"""Reports on runs and sweeps: records, figures and the page that holds them. Nothing here trains."""

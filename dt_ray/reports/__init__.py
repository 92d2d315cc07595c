"""What runs and sweeps came to: records, figures and the page that holds them. Nothing here trains or plays."""

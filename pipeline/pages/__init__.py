"""Self-contained HTML pages: reports, the explorer, charts."""

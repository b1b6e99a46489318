"""From a Study to info tables and Findings; never imports training."""

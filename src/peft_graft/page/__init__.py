"""Reports to look at: one HTML file that needs nothing else, with pictures, readable on a phone and on paper."""

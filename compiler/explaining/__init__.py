"""`graphwright explain`: what the passes did to a graph, as text and as a page."""

"""The one look of what people read: tables in a terminal, and HTML pages. What they say is their owners' business."""

"""What a detector is worth: detections, COCO metrics, latency, reports and gates."""

"""The Ray Serve application: dispatcher, prefill and decode replicas, and the engines inside them."""

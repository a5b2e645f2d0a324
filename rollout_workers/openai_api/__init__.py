"""OpenAI's protocol, with codes: requests and replies, independent of HTTP and Ray; for the service and the gateway."""

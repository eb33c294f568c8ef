"""vLLM's OpenAI-compatible server with what a dropped model adds: routes, a page, bounds on requests."""

# How `llmdrop serve` tells the plugin, which vLLM loads in its own time: bounds as a JSON object, a file of scores, one
# of answers.
LIMITS_ENVIRONMENT, SCORES_ENVIRONMENT = "LLMDROP_LIMITS", "LLMDROP_SCORES"
COMPARISON_ENVIRONMENT = "LLMDROP_COMPARISON"

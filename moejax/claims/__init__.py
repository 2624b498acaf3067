"""The claims page: small experiments on claims of the literature; `page.run_claims` runs them."""

//! OAuth 2.0 resource server: checks signed JSON Web Tokens.

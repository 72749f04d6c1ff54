//! Tokens that a scenario presents: minted when it runs, good ones and deliberately broken ones.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::keys::SigningKey;
use crate::template::{Values, expand, moment};
use crate::yaml::{FileError, read_text};

/// How one token is made. Either `raw`, or a header and claims that are signed with a key.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Token")]
pub struct TokenRecipe {
    /// `FILE#KID`: a private key in a JWK Set; the file is relative to the scenario.
    #[serde(default)]
    pub key: Option<String>,
    /// An HMAC secret as text, instead of `key`.
    #[serde(default)]
    pub secret: Option<String>,
    /// `FILE#KID`: the PEM of that key's public half is the HMAC secret. This is the algorithm confusion attack.
    #[serde(default)]
    pub secret_from_public_key: Option<String>,
    /// The algorithm to sign with; default: the header's `alg`.
    #[serde(default)]
    pub algorithm: Option<String>,
    /// The JOSE header.
    #[serde(default)]
    pub header: Option<Map<String, Value>>,
    /// The JOSE header as text, e.g. with a key written twice.
    #[serde(default)]
    pub header_text: Option<String>,
    /// The claims; `now+300` and the like become numbers.
    #[serde(default)]
    pub claims: Option<Map<String, Value>>,
    /// The payload as text.
    #[serde(default)]
    pub claims_text: Option<String>,
    /// Whether the signature is good; default: `valid`.
    #[serde(default)]
    pub signature: Signature,
    /// The token itself, e.g. pieces of other tokens put together wrongly.
    #[serde(default)]
    pub raw: Option<String>,
}

/// What stands in the third part of a token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Signature {
    /// The signature.
    #[default]
    Valid,
    /// Nothing: `header.payload.`
    None,
    /// The signature with one bit of its middle byte turned over.
    Tampered,
}

/// Makes all tokens of a scenario. Raw ones come last, since they may be put together from the others.
pub(crate) fn mint(
    recipes: &BTreeMap<String, TokenRecipe>,
    file: &Path,
    now: u64,
) -> Result<BTreeMap<String, String>, FileError> {
    let mut values = Values { now, tokens: BTreeMap::new() };
    for (name, recipe) in recipes.iter().filter(|(_, recipe)| recipe.raw.is_none()) {
        let token = recipe.sign(&format!("tokens.{name}"), file, &values)?;
        values.tokens.insert(name.clone(), token);
    }
    let mut raw = Vec::new();
    for (name, recipe) in recipes {
        if let Some(text) = &recipe.raw {
            let path = format!("tokens.{name}");
            if recipe.has_parts() {
                return Err(FileError::at(file, path, "`raw` is the whole token, but there are other keys")
                    .hint("leave out `raw`, or everything else"));
            }
            let text = expand(text, &values)
                .map_err(|(problem, hint)| FileError::at(file, format!("{path}.raw"), problem).hint(hint))?;
            raw.push((name.clone(), text));
        }
    }
    values.tokens.extend(raw);
    Ok(values.tokens)
}

impl TokenRecipe {
    fn has_parts(&self) -> bool {
        self.header.is_some()
            || self.header_text.is_some()
            || self.claims.is_some()
            || self.claims_text.is_some()
            || self.key.is_some()
            || self.secret.is_some()
            || self.secret_from_public_key.is_some()
            || self.algorithm.is_some()
            || self.signature != Signature::Valid
    }

    fn sign(&self, path: &str, file: &Path, values: &Values) -> Result<String, FileError> {
        let header = part(self.header.as_ref(), self.header_text.as_deref(), "header", path, file, values)?;
        let claims = part(self.claims.as_ref(), self.claims_text.as_deref(), "claims", path, file, values)?;
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        if self.signature == Signature::None {
            return Ok(format!("{signed}."));
        }
        let algorithm = self
            .algorithm
            .as_deref()
            .or_else(|| self.header.as_ref().and_then(|header| header.get("alg")).and_then(Value::as_str))
            .ok_or_else(|| {
                FileError::at(file, path, "nothing says which algorithm signs")
                    .hint("give `header.alg` or `algorithm`, or `signature: none`")
            })?;
        let key = self.key(path, file)?;
        let mut signature = key.sign(algorithm, signed.as_bytes()).map_err(|error| {
            FileError::at(file, path, error.to_string())
                .hint("`algorithm` says what to sign with when the header is meant to lie")
        })?;
        if self.signature == Signature::Tampered {
            let middle = signature.len() / 2;
            if let Some(byte) = signature.get_mut(middle) {
                *byte ^= 1;
            }
        }
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    fn key(&self, path: &str, file: &Path) -> Result<SigningKey, FileError> {
        match (&self.key, &self.secret, &self.secret_from_public_key) {
            (Some(reference), None, None) => load_key(reference, &format!("{path}.key"), file),
            (None, Some(secret), None) => Ok(SigningKey::from_secret(secret.as_bytes())),
            (None, None, Some(reference)) => {
                let path = format!("{path}.secret_from_public_key");
                let pem = load_key(reference, &path, file)?
                    .public_pem()
                    .ok_or_else(|| FileError::at(file, path, "a shared secret has no public half"))?;
                Ok(SigningKey::from_secret(pem))
            }
            (None, None, None) => Err(FileError::at(file, path, "there is no key to sign with")
                .hint("add `key: FILE#KID`, `secret: ...` or `signature: none`")),
            _ => Err(FileError::at(file, path, "there is more than one key")
                .hint("keep one of `key`, `secret` and `secret_from_public_key`")),
        }
    }
}

/// The bytes of the header or the claims, from a map or from text.
fn part(
    map: Option<&Map<String, Value>>,
    text: Option<&str>,
    name: &str,
    path: &str,
    file: &Path,
    values: &Values,
) -> Result<String, FileError> {
    match (map, text) {
        (Some(map), None) => {
            let mut map = Value::Object(map.clone());
            resolve_times(&mut map, values.now);
            Ok(map.to_string())
        }
        (None, Some(text)) => expand(text, values)
            .map_err(|(problem, hint)| FileError::at(file, format!("{path}.{name}_text"), problem).hint(hint)),
        (Some(_), Some(_)) => {
            Err(FileError::at(file, path, format!("both `{name}` and `{name}_text` are given"))
                .hint("keep one of them"))
        }
        (None, None) => Err(FileError::at(file, path, format!("`{name}` is missing"))
            .hint(format!("give `{name}` or `{name}_text`, or the whole token as `raw`"))),
    }
}

fn resolve_times(value: &mut Value, now: u64) {
    match value {
        Value::String(text) => {
            if let Some(time) = moment(text, now) {
                *value = Value::from(time);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| resolve_times(item, now)),
        Value::Object(members) => members.values_mut().for_each(|member| resolve_times(member, now)),
        _ => {}
    }
}

fn load_key(reference: &str, path: &str, file: &Path) -> Result<SigningKey, FileError> {
    let Some((name, kid)) = reference.rsplit_once('#') else {
        return Err(FileError::at(file, path, format!("`{reference}` names no key")).hint("write `FILE#KID`"));
    };
    let set_file = file.parent().unwrap_or(Path::new("")).join(name);
    let set = read_text(&set_file)
        .map_err(|error| FileError::at(file, path, format!("`{name}` {}", error.problem)).hint(error.hint))?;
    SigningKey::from_jwk_set(&set, kid).map_err(|error| FileError::at(file, path, format!("`{name}`: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "s.yaml";

    fn recipes(yaml: &str) -> BTreeMap<String, TokenRecipe> {
        crate::yaml::parse(Path::new(FILE), yaml).unwrap()
    }

    fn parts(token: &str) -> Vec<String> {
        token
            .split('.')
            .map(|part| String::from_utf8_lossy(&URL_SAFE_NO_PAD.decode(part).unwrap()).into_owned())
            .collect()
    }

    #[test]
    fn mints_what_the_recipe_says() {
        let tokens = mint(
            &recipes(
                "good: { secret: s, header: { alg: HS256 }, claims: { exp: now+300, cnf: { at: [now-1] }, sub: a } }",
            ),
            Path::new(FILE),
            1000,
        )
        .unwrap();
        let token = &tokens["good"];
        let [header, claims, _] = parts(token).try_into().unwrap();
        assert_eq!(header, r#"{"alg":"HS256"}"#);
        assert_eq!(claims, r#"{"cnf":{"at":[999]},"exp":1300,"sub":"a"}"#);
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"s");
        ring::hmac::verify(&key, signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).unwrap()).unwrap();
    }

    #[test]
    fn breaks_what_the_recipe_wants_broken() {
        let tokens = mint(
            &recipes(
                r#"
good: { secret: s, header: { alg: HS256 }, claims: { sub: a } }
none: { signature: none, header: { alg: none }, claims: { sub: a } }
tampered: { secret: s, signature: tampered, header: { alg: HS256 }, claims: { sub: a } }
twice: { secret: s, algorithm: HS256, header_text: '{"alg":"HS256","alg":"none"}', claims_text: '{"exp":${now+1}}' }
lies: { secret: s, algorithm: HS256, header: { alg: RS256 }, claims: {} }
padded: { raw: "${tokens.good}=" }
swapped: { raw: "${tokens.none.header}.${tokens.good.payload}.${tokens.good.signature}" }
junk: { raw: junk }
"#,
            ),
            Path::new(FILE),
            1000,
        )
        .unwrap();
        assert!(tokens["none"].ends_with('.'));
        let (good, tampered) = (tokens["good"].as_str(), tokens["tampered"].as_str());
        assert_ne!(good, tampered);
        assert_eq!(good.rsplit_once('.').unwrap().0, tampered.rsplit_once('.').unwrap().0);
        assert_eq!(parts(&tokens["twice"].clone())[..2], [r#"{"alg":"HS256","alg":"none"}"#, r#"{"exp":1001}"#]);
        assert_eq!(tokens["padded"], format!("{good}="));
        assert!(tokens["swapped"].starts_with(tokens["none"].split('.').next().unwrap()));
        assert_eq!(tokens["junk"], "junk");
    }

    #[test]
    fn says_what_a_recipe_lacks() {
        let check = |yaml: &str, expected: &str| {
            let error = mint(&recipes(yaml), Path::new(FILE), 1000).unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        check(
            "a: { header: { alg: HS256 }, claims: {} }",
            "s.yaml: tokens.a: there is no key to sign with\n  hint: add `key: FILE#KID`, `secret: ...` or `signature: none`",
        );
        check(
            "a: { secret: s, header: {}, claims: {} }",
            "s.yaml: tokens.a: nothing says which algorithm signs\n  hint: give `header.alg` or `algorithm`, or `signature: none`",
        );
        check(
            "a: { secret: s, header: { alg: RS256 }, claims: {} }",
            "s.yaml: tokens.a: `RS256` cannot be signed with a shared key; it signs HS256, HS384 and HS512\n  \
             hint: `algorithm` says what to sign with when the header is meant to lie",
        );
        check(
            "a: { key: nowhere.json#k, header: { alg: RS256 }, claims: {} }",
            "s.yaml: tokens.a.key: `nowhere.json` cannot be read: there is no such file\n  \
             hint: paths are relative to the file that names them",
        );
        check(
            "a: { key: keys.json, header: { alg: RS256 }, claims: {} }",
            "s.yaml: tokens.a.key: `keys.json` names no key\n  hint: write `FILE#KID`",
        );
        check(
            "a: { raw: x, secret: s }",
            "s.yaml: tokens.a: `raw` is the whole token, but there are other keys\n  hint: leave out `raw`, or everything else",
        );
        check(
            "a: { raw: '${tokens.b}' }",
            "s.yaml: tokens.a.raw: there is no token `b`\n  hint: the scenario has no `tokens`",
        );
    }
}

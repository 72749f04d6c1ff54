//! What hosts, networks, ports and field names look like.

use std::net::IpAddr;

use crate::policy::{HostPort, Network};
use crate::route::HostPattern;

/// RFC 9110, section 5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

pub(super) fn is_dns_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
        // All digits and dots would be an IP address with a typing error.
        && !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

/// `name:port`, `1.2.3.4:port` or `[::1]:port`.
pub(super) fn host_port(text: &str) -> Option<HostPort> {
    let (host, port) = text.rsplit_once(':')?;
    let port = Some(port)
        .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))?
        .parse()
        .ok()
        .filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(ip) => ip.parse::<std::net::Ipv6Addr>().ok()?.to_string(),
        None if is_dns_name(host) => host.to_ascii_lowercase(),
        None => host.parse::<std::net::Ipv4Addr>().ok()?.to_string(),
    };
    Some(HostPort { host, port })
}

pub(super) fn host_pattern(text: &str) -> Result<HostPattern, String> {
    let lower = text.to_ascii_lowercase();
    if lower == "*" {
        return Ok(HostPattern::Any);
    }
    if let Some(suffix) = lower.strip_prefix('*') {
        return match suffix.strip_prefix('.') {
            Some(name) if is_dns_name(name) => Ok(HostPattern::Below(suffix.to_owned())),
            _ => Err("a wildcard stands for whole labels at the start: `*.example.com`".to_owned()),
        };
    }
    let is_ip = lower.parse::<std::net::Ipv4Addr>().is_ok()
        || lower
            .strip_prefix('[')
            .and_then(|ip| ip.strip_suffix(']'))
            .is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok());
    if is_dns_name(&lower) || is_ip {
        return Ok(HostPattern::Exact(lower));
    }
    Err(match lower.rsplit_once(':') {
        _ if lower.contains("//") => "write the host only, without scheme and path".to_owned(),
        Some((host, _)) if is_dns_name(host) => format!("the port does not matter; write `{host}`"),
        _ if lower.ends_with('.') && is_dns_name(lower.trim_end_matches('.')) => {
            format!("leave out the final dot: `{}`", lower.trim_end_matches('.'))
        }
        _ => "write e.g. `api.example.com`, `*.example.com` or `*`".to_owned(),
    })
}

pub(super) fn network(text: &str) -> Result<Network, (String, String)> {
    let wrong =
        || (format!("`{text}` is not a network"), "write an address and a prefix length, e.g. `10.0.0.0/8`".to_owned());
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix: u8 = match prefix {
        None => longest,
        Some(prefix) => prefix.parse().ok().filter(|prefix| *prefix <= longest).ok_or_else(wrong)?,
    };
    if prefix == 0 {
        return Err((
            format!("`{text}` is every address, so any client could claim to be any other"),
            "name the networks of your proxies only".to_owned(),
        ));
    }
    let start = match address {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)).into()),
        IpAddr::V6(ip) => {
            IpAddr::V6((ip.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)).into())
        }
    };
    if start != address {
        return Err((format!("`{text}` has bits set after its prefix"), format!("write `{start}/{prefix}`")));
    }
    Ok(Network { address, prefix })
}

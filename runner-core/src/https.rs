//! Inputs by `https`: which URLs a spec may name, and which addresses may be asked for them.
//!
//! The rules are pure and live here; the transport is the staging library's. Nothing of the service's own goes to a URL of
//! a caller's choice: no credentials, no cookies, and no request to an address inside of the service's own network.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::id::InvalidId;

const MAX_URL_BYTES: usize = 2048;
const MAX_HOST_BYTES: usize = 253;
const DEFAULT_PORT: u16 = 443;

/// An `https` URL without user, password and fragment. ASCII; the host is in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HttpsUrl {
    text: String,
    /// Where the host ends in `text`; it begins behind `https://`.
    host_end: usize,
    port: u16,
}

const SCHEME: &str = "https://";

impl HttpsUrl {
    /// The URL.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The host: a name, an IPv4 address, or an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        &self.text[SCHEME.len()..self.host_end]
    }

    /// The port; 443 where it names none.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host as an address, where it is one.
    pub fn address(&self) -> Option<IpAddr> {
        let host = self.host();
        match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) => v6.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        }
    }

    /// Without the query, which may hold a signature: for messages.
    pub fn shown(&self) -> &str {
        self.text.split('?').next().unwrap_or_default()
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() > MAX_URL_BYTES {
            return Err("at most 2048 bytes");
        }
        let rest = text.strip_prefix(SCHEME).ok_or("it begins with `https://`")?;
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("only printable ASCII; anything else is percent-encoded");
        }
        if text.contains(['#', '\\']) {
            return Err("no fragment and no backslash");
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if authority.contains('@') {
            return Err("no user and no password");
        }
        let (host, port) = split_port(authority)?;
        let host = host.to_ascii_lowercase();
        check_host(&host)?;
        let separator = if path.starts_with('/') { "" } else { "/" };
        let shown_port = if port == DEFAULT_PORT { String::new() } else { format!(":{port}") };
        let host_end = SCHEME.len() + host.len();
        Ok(Self { text: format!("{SCHEME}{host}{shown_port}{separator}{path}"), host_end, port })
    }
}

fn split_port(authority: &str) -> Result<(&str, u16), &'static str> {
    let behind_host = authority.rfind(']').map_or(0, |at| at + 1);
    match authority[behind_host..].rfind(':') {
        None => Ok((authority, DEFAULT_PORT)),
        Some(at) => {
            let digits = &authority[behind_host + at + 1..];
            let port = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u16>().ok());
            match port.flatten() {
                Some(port) if port != 0 => Ok((&authority[..behind_host + at], port)),
                _ => Err("a port from 1 to 65535"),
            }
        }
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    if let Some(v6) = host.strip_prefix('[') {
        let v6 = v6.strip_suffix(']').ok_or("a host")?;
        return v6.parse::<Ipv6Addr>().map(drop).map_err(|_| "an IPv6 address in brackets, without a zone");
    }
    let labels_fit = host.split('.').all(|label| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    });
    if host.len() > MAX_HOST_BYTES || !labels_fit {
        return Err("a host name or an address");
    }
    // `127.1`, `0x7f.1` and `2130706433` are addresses to a resolver, and names to whoever compares texts.
    let last = host.rsplit('.').next().unwrap_or_default();
    let numeric = last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x");
    if numeric && host.parse::<Ipv4Addr>().is_err() {
        return Err("an IPv4 address as four decimal numbers");
    }
    Ok(())
}

impl fmt::Display for HttpsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for HttpsUrl {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        Self::parse(s).map_err(|rule| InvalidId {
            what: "URL",
            value: s.split('?').next().unwrap_or_default().chars().take(80).collect(),
            rule,
        })
    }
}

impl TryFrom<String> for HttpsUrl {
    type Error = InvalidId;

    fn try_from(s: String) -> Result<Self, InvalidId> {
        s.parse()
    }
}

impl From<HttpsUrl> for String {
    fn from(url: HttpsUrl) -> String {
        url.text
    }
}

/// Hosts that inputs may come from: `HOST`, `*.DOMAIN` for every name below a domain, each with `:PORT` where that is not
/// 443.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPattern {
    below: bool,
    host: String,
    port: u16,
}

impl HostPattern {
    /// Whether it names the host and the port.
    pub fn matches(&self, url: &HttpsUrl) -> bool {
        // One dot at the end of a name means the same name to a resolver.
        let host = url.host();
        let named = if self.below {
            host.strip_suffix(self.host.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        } else {
            host == self.host
        };
        named && url.port() == self.port
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let below = if self.below { "*." } else { "" };
        write!(f, "{below}{}", self.host)?;
        if self.port == DEFAULT_PORT { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

impl FromStr for HostPattern {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            what: "host",
            value: s.chars().take(80).collect(),
            rule: "`HOST` or `*.DOMAIN`, with `:PORT` where it is not 443",
        };
        let (below, rest) = s.strip_prefix("*.").map_or((false, s), |rest| (true, rest));
        let (host, port) = split_port(rest).map_err(|_| invalid())?;
        let host = host.to_ascii_lowercase();
        check_host(&host).map_err(|_| invalid())?;
        let is_address = host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok();
        if below && is_address { Err(invalid()) } else { Ok(Self { below, host, port }) }
    }
}

impl TryFrom<String> for HostPattern {
    type Error = InvalidId;

    fn try_from(s: String) -> Result<Self, InvalidId> {
        s.parse()
    }
}

impl From<HostPattern> for String {
    fn from(host: HostPattern) -> String {
        host.to_string()
    }
}

/// A range of addresses, as `10.0.0.0/8` or `fd00::/8`; an address alone is a range of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AddressRange {
    address: IpAddr,
    prefix: u8,
}

impl AddressRange {
    /// Whether an address is in it. An IPv4 range has no IPv6 address, also no mapped one.
    pub fn contains(&self, address: IpAddr) -> bool {
        let same = |a: u128, b: u128, bits: u32| bits == 0 || (a ^ b) >> (128 - bits) == 0;
        let prefix = u32::from(self.prefix);
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                same(u128::from(u32::from(a)) << 96, u128::from(u32::from(b)) << 96, prefix)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => same(a.into(), b.into(), prefix),
            _ => false,
        }
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for AddressRange {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            what: "address range",
            value: s.chars().take(80).collect(),
            rule: "an address, or an address, `/` and the number of its leading bits that count",
        };
        let (address, prefix) = s.split_once('/').map_or((s, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => most,
            Some(bits) => bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(invalid)?,
        };
        Ok(Self { address, prefix })
    }
}

impl TryFrom<String> for AddressRange {
    type Error = InvalidId;

    fn try_from(s: String) -> Result<Self, InvalidId> {
        s.parse()
    }
}

impl From<AddressRange> for String {
    fn from(range: AddressRange) -> String {
        range.to_string()
    }
}

/// Whether an address is one of the public internet: everything that the IANA registries of special-purpose addresses
/// (RFC 6890 and its updates) do not list as anything else. An IPv6 address that carries an IPv4 address (mapped, 6to4,
/// NAT64, Teredo) is never public here, whatever it carries.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            !(matches!(a, 0 | 10 | 127)
                || (a == 100 && (64..128).contains(&b))
                || (a == 169 && b == 254)
                || (a == 172 && (16..32).contains(&b))
                || (a == 192 && b == 168)
                || (a == 192 && b == 0 && matches!(c, 0 | 2))
                || (a == 192 && b == 88 && c == 99)
                || (a == 198 && matches!(b, 18 | 19))
                || (a == 198 && b == 51 && c == 100)
                || (a == 203 && b == 0 && c == 113)
                // Multicast, reserved and broadcast.
                || a >= 224)
        }
        IpAddr::V6(v6) => {
            let [a, b, ..] = v6.segments();
            // Only 2000::/3 is given out for the internet; what is special in it comes next.
            a & 0xe000 == 0x2000
                // 2001::/23: protocol assignments, Teredo among them. 2001:db8::/32: documentation.
                && !(a == 0x2001 && (b < 0x0200 || b == 0x0db8))
                // 6to4.
                && a != 0x2002
                // 3fff::/20: documentation.
                && !(a == 0x3fff && b < 0x1000)
        }
    }
}

/// Whether and how inputs are fetched by `https`. The default allows no host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpsPolicy {
    /// Hosts that a spec may name, and that a redirect may lead to. Empty: inputs by `https` are refused.
    pub hosts: Vec<HostPattern>,
    /// Addresses that may be asked though they are not [public](is_public).
    pub allow_addresses: Vec<AddressRange>,
    /// Most bytes of one input.
    pub max_bytes: u64,
    /// Most redirects of one input. Each is checked like the first URL.
    pub max_redirects: u32,
    /// Longest time to resolve a name, and to connect.
    pub connect_timeout: Duration,
    /// Longest time without a byte.
    pub stall_timeout: Duration,
    /// Longest time for one input, all in all.
    pub timeout: Duration,
    /// Certificates to trust beside the machine's own, as PEM.
    #[serde(default, with = "shared_text", skip_serializing_if = "Option::is_none")]
    pub ca_pem: Option<Arc<str>>,
    /// The public authorities that this build knows are trusted in place of the machine's own: for where it has none. Not told to
    /// others, whose machine is another one.
    #[serde(skip)]
    pub bundled_roots: bool,
}

/// Text that is shared, as text.
mod shared_text {
    use std::sync::Arc;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    #[allow(clippy::ref_option, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(text: &Option<Arc<str>>, to: S) -> Result<S::Ok, S::Error> {
        text.as_deref().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Arc<str>>, D::Error> {
        Ok(Option::<String>::deserialize(from)?.map(Arc::from))
    }
}

impl Default for HttpsPolicy {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            allow_addresses: Vec::new(),
            max_bytes: 16 << 30,
            max_redirects: 5,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            timeout: Duration::from_secs(3600),
            ca_pem: None,
            bundled_roots: false,
        }
    }
}

impl HttpsPolicy {
    /// Whether a URL's host may be asked.
    pub fn allows_host(&self, url: &HttpsUrl) -> bool {
        self.hosts.iter().any(|host| host.matches(url))
    }

    /// Whether an address may be asked.
    pub fn allows_address(&self, address: IpAddr) -> bool {
        is_public(address) || self.allow_addresses.iter().any(|range| range.contains(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart_and_written_in_one_way() {
        for (text, host, port, written) in [
            ("https://a.example/x?y=1", "a.example", 443, "https://a.example/x?y=1"),
            ("https://A.Example:443", "a.example", 443, "https://a.example/"),
            ("https://a.example:8443?x", "a.example", 8443, "https://a.example:8443/?x"),
            ("https://192.0.2.7/x", "192.0.2.7", 443, "https://192.0.2.7/x"),
            ("https://[2001:db8::1]:99/x", "[2001:db8::1]", 99, "https://[2001:db8::1]:99/x"),
        ] {
            let url: HttpsUrl = text.parse().unwrap();
            assert_eq!((url.host(), url.port(), url.as_str()), (host, port, written));
        }
        let url: HttpsUrl = "https://a.example/x?token=secret".parse().unwrap();
        assert_eq!(url.shown(), "https://a.example/x");
    }

    #[test]
    fn urls_that_hide_something_are_refused() {
        for text in [
            "http://a.example/",
            "HTTPS://a.example/",
            "https://",
            "https:///x",
            "https://user@a.example/",
            "https://user:password@a.example/",
            "https://a.example\\@b.example/",
            "https://a.example#b",
            "https://a.example/a b",
            "https://a.example/\n",
            "https://ü.example/",
            "https://a.example:0/",
            "https://a.example:65536/",
            "https://a.example:+1/",
            "https://a..example/",
            "https://127.1/",
            "https://0x7f000001/",
            "https://2130706433/",
            "https://0177.0.0.1/",
            "https://[::1/",
            "https://[::1%25lo]/",
            "https://[v1.x]/",
        ] {
            assert!(text.parse::<HttpsUrl>().is_err(), "{text}");
        }
        assert!(format!("https://a.example/{}", "x".repeat(2048)).parse::<HttpsUrl>().is_err());
    }

    #[test]
    fn a_host_is_allowed_by_its_whole_name_and_port() {
        let allows =
            |pattern: &str, url: &str| pattern.parse::<HostPattern>().unwrap().matches(&url.parse().unwrap());
        assert!(allows("a.example", "https://a.example/x"));
        assert!(allows("A.example", "https://a.EXAMPLE/x"));
        assert!(allows("*.example", "https://a.b.example/x"));
        assert!(allows("a.example:8443", "https://a.example:8443/"));
        assert!(!allows("a.example", "https://a.example:8443/"));
        assert!(!allows("a.example", "https://a.example.evil/"));
        assert!(!allows("a.example", "https://xa.example/"));
        assert!(!allows("*.a.example", "https://a.example/"));
        assert!(!allows("*.a.example", "https://xa.example/"));
        for bad in ["", "*", "*.", "a.example/x", "*.192.0.2.1", "a:b", "https://a"] {
            assert!(bad.parse::<HostPattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_addresses_of_the_internet_are_public() {
        for public in ["1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for other in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.0.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
        ] {
            assert!(!is_public(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn a_range_allows_what_its_leading_bits_cover() {
        let policy = HttpsPolicy {
            allow_addresses: ["10.1.0.0/16", "127.0.0.1", "fd00::/8"].map(|r| r.parse().unwrap()).into(),
            ..HttpsPolicy::default()
        };
        for (address, allowed) in [
            ("10.1.255.1", true),
            ("10.2.0.1", false),
            ("127.0.0.1", true),
            ("127.0.0.2", false),
            ("fd99::1", true),
            ("fc99::1", false),
            ("::ffff:127.0.0.1", false),
            ("9.9.9.9", true),
        ] {
            assert_eq!(policy.allows_address(address.parse().unwrap()), allowed, "{address}");
        }
        assert!("0.0.0.0/0".parse::<AddressRange>().unwrap().contains("9.9.9.9".parse().unwrap()));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "a/8", "10.0.0.0/"] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
    }
}

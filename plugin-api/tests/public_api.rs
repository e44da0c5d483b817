//! What plugins are compiled against, as text: each public item of this crate and of `moeut-torch` without its body.
//!
//! A change that nobody meant shows here before it shows in somebody's plugin. The sources are parsed, because the
//! compiler's own list is for nightly toolchains only. Bodies, documentation and what is private are left out; private
//! fields of what crosses the boundary are layout and stay.

use proc_macro2::{TokenStream, TokenTree};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use syn::{Attribute, Fields, File, ImplItem, Item, TraitItem, Type, Visibility, parse_quote};

const MEANT: &str = "\
if this change is meant, type

    INSTA_UPDATE=always cargo test -p moeut-plugin-api --test public_api

look at the difference, and commit it. Plugins of API 1.0 must load in every 1.x host: what crosses the boundary is only
added to, at the end, and raises ABI_MINOR";

fn check(name: &str, library: &Path) {
    let text = listing(library);
    insta::with_settings!({description => MEANT, prepend_module_to_snapshot => false}, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn moeut_plugin_api() {
    check("moeut_plugin_api", &crate_folder().join("src/lib.rs"));
}

#[test]
fn moeut_torch() {
    check("moeut_torch", &crate_folder().join("torch/src/lib.rs"));
}

fn crate_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The public items of a crate, one module behind the other.
fn listing(library: &Path) -> String {
    let mut modules = Vec::new();
    let folder = library.parent().unwrap_or(library);
    read_module("crate", library, folder, &mut modules);
    let public: BTreeSet<String> = modules
        .iter()
        .flat_map(|module| &module.items)
        .filter_map(public_type)
        .collect();
    let mut text = String::new();
    for Module { path, items } in modules {
        let items: Vec<Item> = items
            .into_iter()
            .filter_map(|item| stripped(item, &public))
            .collect();
        if !items.is_empty() {
            let file = File {
                shebang: None,
                attrs: Vec::new(),
                items,
            };
            let _ = write!(text, "// {path}\n{}\n", prettyplease::unparse(&file));
        }
    }
    text
}

struct Module {
    path: String,
    items: Vec<Item>,
}

/// Parses a file and those of its modules.
fn read_module(path: &str, file: &Path, folder: &Path, all: &mut Vec<Module>) {
    let source =
        std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let parsed =
        syn::parse_file(&source).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    add_module(path, parsed.items, folder, all);
}

/// Adds a module's items, and behind them those of its modules, except the tests.
fn add_module(path: &str, items: Vec<Item>, folder: &Path, all: &mut Vec<Module>) {
    let (modules, items): (Vec<Item>, Vec<Item>) = items
        .into_iter()
        .partition(|item| matches!(item, Item::Mod(_)));
    all.push(Module {
        path: path.to_owned(),
        items,
    });
    for module in modules {
        let Item::Mod(module) = module else { continue };
        if is_test(&module.attrs) {
            continue;
        }
        let path = format!("{path}::{}", module.ident);
        let own = folder.join(module.ident.to_string());
        if let Some((_, items)) = module.content {
            add_module(&path, items, &own, all);
        } else {
            let flat = own.with_extension("rs");
            let is_flat = flat.is_file();
            let file = if is_flat { flat } else { own.join("mod.rs") };
            read_module(&path, &file, &own, all);
        }
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    let test: Attribute = parse_quote!(#[cfg(test)]);
    attributes.contains(&test)
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// The name of a public type: what others implement for it is public, too.
fn public_type(item: &Item) -> Option<String> {
    let (visibility, name) = match item {
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Enum(item) => (&item.vis, &item.ident),
        Item::Union(item) => (&item.vis, &item.ident),
        Item::Type(item) => (&item.vis, &item.ident),
        _ => return None,
    };
    is_public(visibility).then(|| name.to_string())
}

/// A public item without what is private in it; none for others.
fn stripped(mut item: Item, public: &BTreeSet<String>) -> Option<Item> {
    let attributes = match &mut item {
        Item::Const(item) => &mut item.attrs,
        Item::Enum(item) => &mut item.attrs,
        Item::Fn(item) => &mut item.attrs,
        Item::Impl(item) => &mut item.attrs,
        Item::Macro(item) => &mut item.attrs,
        Item::Static(item) => &mut item.attrs,
        Item::Struct(item) => &mut item.attrs,
        Item::Trait(item) => &mut item.attrs,
        Item::Type(item) => &mut item.attrs,
        Item::Union(item) => &mut item.attrs,
        Item::Use(item) => &mut item.attrs,
        _ => return None,
    };
    if is_test(attributes) {
        return None;
    }
    strip_attributes(attributes);
    let is_shown = match &mut item {
        Item::Const(item) => is_public(&item.vis),
        Item::Static(item) => is_public(&item.vis),
        Item::Type(item) => is_public(&item.vis),
        Item::Union(item) => is_public(&item.vis),
        Item::Use(item) => is_public(&item.vis),
        Item::Fn(item) => {
            *item.block = parse_quote!({});
            is_public(&item.vis)
        }
        Item::Enum(item) => {
            for variant in &mut item.variants {
                strip_attributes(&mut variant.attrs);
                strip_fields(&mut variant.fields, true);
            }
            is_public(&item.vis)
        }
        Item::Struct(item) => {
            let is_layout = item
                .attrs
                .iter()
                .any(|attribute| attribute.path().is_ident("repr"));
            strip_fields(&mut item.fields, is_layout);
            is_public(&item.vis)
        }
        Item::Trait(item) => {
            for item in &mut item.items {
                strip_trait_item(item);
            }
            is_public(&item.vis)
        }
        Item::Impl(item) => {
            let is_of_trait = item.trait_.is_some();
            item.items
                .retain_mut(|item| strip_impl_item(item, is_of_trait));
            let is_of_public = name_of(&item.self_ty).is_none_or(|name| public.contains(&name));
            is_of_public && (is_of_trait || !item.items.is_empty())
        }
        Item::Macro(item) => {
            item.mac.tokens = without_bodies(item.mac.tokens.clone());
            let mut attributes = item.attrs.iter();
            attributes.any(|attribute| attribute.path().is_ident("macro_export"))
        }
        _ => false,
    };
    is_shown.then_some(item)
}

/// Attributes that matter to who uses an item, or to what it looks like in memory or as JSON.
fn strip_attributes(attributes: &mut Vec<Attribute>) {
    const KEPT: [&str; 9] = [
        "derive",
        "macro_export",
        "non_exhaustive",
        "repr",
        "sabi",
        "sabi_trait",
        "serde",
        "error",
        "default",
    ];
    attributes.retain(|attribute| {
        let name = attribute.path().segments.last();
        name.is_some_and(|name| KEPT.iter().any(|kept| name.ident == kept))
    });
}

/// Fields that are not public become `_private: _`, unless all of them are.
fn strip_fields(fields: &mut Fields, keeps_private: bool) {
    for field in fields.iter_mut() {
        strip_attributes(&mut field.attrs);
    }
    if keeps_private {
        return;
    }
    match fields {
        Fields::Unit => {}
        Fields::Named(fields) => {
            let n_fields = fields.named.len();
            let public = std::mem::take(&mut fields.named).into_iter();
            fields.named = public.filter(|field| is_public(&field.vis)).collect();
            if fields.named.len() < n_fields {
                let hidden: syn::FieldsNamed = parse_quote!({ _private: _ });
                fields.named.extend(hidden.named);
            }
        }
        Fields::Unnamed(fields) => {
            for field in &mut fields.unnamed {
                if !is_public(&field.vis) {
                    field.ty = parse_quote!(_);
                }
            }
        }
    }
}

/// That a method has a body of its own is kept: without, every plugin has to write one.
fn strip_trait_item(item: &mut TraitItem) {
    match item {
        TraitItem::Const(item) => strip_attributes(&mut item.attrs),
        TraitItem::Type(item) => strip_attributes(&mut item.attrs),
        TraitItem::Fn(item) => {
            strip_attributes(&mut item.attrs);
            if item.default.is_some() {
                item.default = Some(parse_quote!({}));
            }
        }
        _ => {}
    }
}

/// Of a trait's implementation its associated types matter; of a type's own what is public.
fn strip_impl_item(item: &mut ImplItem, is_of_trait: bool) -> bool {
    match item {
        ImplItem::Const(item) => {
            strip_attributes(&mut item.attrs);
            !is_of_trait && is_public(&item.vis)
        }
        ImplItem::Fn(item) => {
            strip_attributes(&mut item.attrs);
            item.block = parse_quote!({});
            !is_of_trait && is_public(&item.vis)
        }
        ImplItem::Type(_) => true,
        _ => false,
    }
}

/// The name of a type of this crate, behind references; none for what is no plain name.
fn name_of(of: &Type) -> Option<String> {
    match of {
        Type::Path(path) => Some(path.path.segments.last()?.ident.to_string()),
        Type::Reference(reference) => name_of(&reference.elem),
        _ => None,
    }
}

/// `(patterns) => {}` of each arm of a macro.
fn without_bodies(tokens: TokenStream) -> TokenStream {
    let mut is_body = false;
    let strip = |token| match token {
        TokenTree::Group(group) if is_body => {
            is_body = false;
            let empty = proc_macro2::Group::new(group.delimiter(), TokenStream::new());
            TokenTree::Group(empty)
        }
        TokenTree::Punct(punct) => {
            is_body = punct.as_char() == '>';
            TokenTree::Punct(punct)
        }
        other => other,
    };
    tokens.into_iter().map(strip).collect()
}

#[test]
fn what_is_public_is_listed_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let library = folder.path().join("lib.rs");
    let source = r"
        //! Documentation.
        mod inner;
        pub use inner::Shown;
        pub const N: usize = 3;
        /// Documented.
        pub fn public(x: &str) -> Option<u32> { x.parse().ok() }
        pub(crate) fn hidden() {}
        pub trait Work {
            const NAME: &'static str;
            fn must(&self) -> u8;
            fn may(&self) -> u8 { 1 }
        }
        #[macro_export]
        macro_rules! say { () => { hidden() }; ($what:expr) => { drop($what) }; }
        macro_rules! whisper { () => {} }
        #[cfg(test)]
        mod tests { pub fn not_this() {} }
    ";
    let inner = r"
        #[derive(Debug)]
        pub struct Shown { pub a: u8, b: u8 }
        #[repr(C)]
        pub struct Layout { pub a: u8, b: u8 }
        struct Private;
        impl Shown { pub fn new() -> Self { Self { a: 1, b: 2 } } fn secret(&self) {} }
        impl Clone for Shown { fn clone(&self) -> Self { Self::new() } }
        impl Clone for Private { fn clone(&self) -> Self { Self } }
    ";
    std::fs::write(&library, source).expect("a file can be written");
    std::fs::write(folder.path().join("inner.rs"), inner).expect("a file can be written");
    insta::assert_snapshot!(listing(&library), @r"
    // crate
    pub use inner::Shown;
    pub const N: usize = 3;
    pub fn public(x: &str) -> Option<u32> {}
    pub trait Work {
        const NAME: &'static str;
        fn must(&self) -> u8;
        fn may(&self) -> u8 {}
    }
    #[macro_export]
    macro_rules! say {
        () => {};
        ($what:expr) => {};
    }

    // crate::inner
    #[derive(Debug)]
    pub struct Shown {
        pub a: u8,
        _private: _,
    }
    #[repr(C)]
    pub struct Layout {
        pub a: u8,
        b: u8,
    }
    impl Shown {
        pub fn new() -> Self {}
    }
    impl Clone for Shown {}
    ");
}
